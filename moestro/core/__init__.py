"""The nouns: routing, context, layer, plans, cards. No Transformers import here."""
