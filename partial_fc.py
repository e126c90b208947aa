"""PartialFC, a margin softmax over millions of identities with sharded class centers.

    embedding e_i, label y_i, class center w_j:   cos_ij = <e_i/|e_i|, w_j/|w_j|>
    z_ij = s cos_ij,  z_iy = s margin(cos_iy),    loss = mean_i (logsumexp_j z_ij - z_iy)

    head = PartialFC(
        margin,                    # ArcFace(), CosFace(), ... of losses.py
        embedding_size,            # D
        num_classes,               # C over all ranks; each rank holds its part of the centers
        sample_rate=1.0,           # r: share of a rank's classes in a step, beside the positives
        *,
        row_optimizer=None,        # SGDRows(momentum, weight_decay) or AdamWRows(...)
        update=None,               # "fused", or "autograd" for the reference path
        process_group=None,        # ranks that share the classes
        ...
    )
    loss = head(local_embeddings, local_labels)    # the mean over the global batch, on every rank
    loss.backward()                                # dE and the gradient of the centers
    head.step(learning_rate)

The class is in arcshard/partial_fc.py. The loop over blocks of classes, which forward and backward
share, is in arcshard/head/fused.py. `pip install .` makes the class available without the trainer,
as `from arcshard import PartialFC`.

An et al. 2022, "Killing Two Birds with One Stone" (arXiv:2203.15565); An et al. 2021, "Partial FC"
(arXiv:2010.05222).
"""

from arcshard.partial_fc import PartialFC

__all__ = ["PartialFC"]
