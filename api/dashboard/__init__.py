"""The page for operators, and what it asks for: everything behind `/dashboard`."""
