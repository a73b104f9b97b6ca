"""Language models: their own way through export, as what is proven is a continuation token by token."""
