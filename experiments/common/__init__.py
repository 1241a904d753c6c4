"""What the training runs share: recipes and tasks, the training loop, the working directory, the command line."""
