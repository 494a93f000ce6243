"""The core: nouns, needs, verbs and back ends. Knows no HTTP."""
