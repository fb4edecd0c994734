"""From files and Hub data sets to token ids with the supervised ones marked."""
