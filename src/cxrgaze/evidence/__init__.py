"""Evidence: how one knows that two networks agree, and what one is worth."""
