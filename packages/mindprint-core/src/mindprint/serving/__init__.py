"""An OpenAI-compatible server for one adapter: `protocol` reads requests, `batching` answers them, `app` is HTTP."""
