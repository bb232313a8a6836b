"""What patching does to a model: finding what is patched, inserting, switching, and undoing all of it."""
