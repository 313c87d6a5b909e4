"""Both views of a completion in one pass: packing, trees, the head and its gradients."""
