"""Assignment of codes by coordinate descent."""
