"""What the product does, for a viewer: every call takes who is asking and answers only about what is theirs."""
