"""What every room needs: errors, lines to the user, text, how the tool was called, processes."""
