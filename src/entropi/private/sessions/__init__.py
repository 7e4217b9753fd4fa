"""The two sides of a private conversation: client, server, and the process on either side that is its party."""
