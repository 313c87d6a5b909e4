"""Say where a recipe runs: ranks, meshes and tensor parallelism."""
