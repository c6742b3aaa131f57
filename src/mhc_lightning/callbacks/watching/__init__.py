"""How the mappings of a model are observed: hooks, order of sub-layers, chains of streams."""
