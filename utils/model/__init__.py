"""From a folder or the hub to a model that trains, and back to a folder."""
