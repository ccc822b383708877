"""Every section of a recipe, one file a stage. Imports nothing heavy: what is wrong with a setting is said at once."""
