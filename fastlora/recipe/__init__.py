"""Recipes: what a user asks for, validated once, before anything heavy is imported."""
