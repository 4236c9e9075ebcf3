"""What is stored: tables, message parts, identifiers and the one door to PostgreSQL."""
