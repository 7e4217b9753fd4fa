"""What both parties compute before a prompt is known, and where each keeps it until it is used once."""
