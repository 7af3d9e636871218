"""What public functions and backends agree on: where frames lie, each operation's request, the torch ops."""
