from diffusers_pq import PQModel  # noqa: F401
