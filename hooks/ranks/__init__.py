"""Several processes that train one model: roll call, who measures what, and how pieces come together."""
