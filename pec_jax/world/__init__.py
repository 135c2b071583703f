"""The embedded world: pictures of objects before a horizon, and what a crowd makes of them."""
