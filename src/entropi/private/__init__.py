"""Private inference between two processes: program, engine, sessions; torch is imported nowhere here."""
