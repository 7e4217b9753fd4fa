"""What is computed in private, and with which numbers: opens no socket, and knows nobody on the other side."""
