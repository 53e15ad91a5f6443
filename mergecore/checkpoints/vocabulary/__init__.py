"""Models whose vocabularies differ, read as if they all had one: rows of embeddings and heads gathered by an index."""
