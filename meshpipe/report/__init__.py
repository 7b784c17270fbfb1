"""What people read: tables, pictures, and phases of long work."""
