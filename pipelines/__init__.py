"""Diffusion pipelines on product-quantised latents; installed as `diffusers_pq.pipelines`."""
