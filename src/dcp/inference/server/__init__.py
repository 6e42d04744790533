"""``dcp serve``: OpenAI's routes over HTTP on the first rank, the engine on all of them."""
