"""What makes a voice, measured."""
