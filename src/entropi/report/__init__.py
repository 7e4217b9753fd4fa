"""Records to tables, figures and one HTML page; reads files, never live objects, and needs no torch."""
