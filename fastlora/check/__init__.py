"""What is wrong with the rows of a recipe, found before they are trained on."""
