"""From rows of a file to packed batches: what is read, what it becomes, who judges it."""
