"""What the client says to the server and how it reads the answers. Every call stands here once, as a flow
(service/wire/flows.py); service/client.py runs it blocking or in an event loop. Needs httpx alone."""
