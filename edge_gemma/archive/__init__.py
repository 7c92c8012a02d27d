"""Archives: thousands of recordings and prompts, on one machine or many, each done once.

Owns: which requests there are, the journal of what is done, processes that work and what becomes of a request that ends
one, results on disk, searching them. Does not know: how speech is written down, how an answer is made, screens.
"""
