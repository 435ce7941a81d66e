"""What a config adds to training: hooks and optimizer constructors."""
