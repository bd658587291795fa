"""Pictures, captions and classes: reading, cropping, loading, caching."""
