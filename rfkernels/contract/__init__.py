"""What the public functions and the backends agree on: where frames lie, the request of each operation, the torch ops."""
