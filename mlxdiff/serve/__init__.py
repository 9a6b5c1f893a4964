"""A server that keeps a model loaded: jobs, three HTTP interfaces, a page.

    engine     one thread that owns the pipeline, a bounded queue, jobs
    shelf      what clients may name: models, LoRAs, ...; never a path
    gallery    finished pictures on the disk
    request    what a client sends -> an order for the engine
    schema     option tables -> JSON schema
    http, guard, own_api, openai_api, a1111_api, page.html: over HTTP (the extra ``server``)
    mcp        tools for agents, over standard input and output (the extra ``mcp``)

Only the command line imports this part.
"""
