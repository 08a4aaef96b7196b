"""The embedded data set, teacher and judge: builders, recipes and assets."""
