"""Training: dense, indexer warm-up, sparse, as one resumable run; see ``train.runs`` and docs/training.md.

A loop of your own takes the model, optax and three functions. ``for_training`` adapts the config to the row length.
``cross_entropy`` is blocked over tokens, so that the logits of all tokens never exist at once. ``decay_mask`` keeps
weight decay off norms, biases and whatever the loss does not reach. With a config whose ``index_loss`` is on:

    import jax
    import optax
    from dsa_jax import Transformer, for_training
    from train.loss import cross_entropy
    from train.optimizer import decay_mask

    def fit(config, params, batches):
        model = Transformer(for_training(config, batches[0]["tokens"].shape[1]))
        optimizer = optax.adamw(3e-3, weight_decay=0.1, mask=decay_mask)

        def loss_of(params, batch):
            tokens, documents = batch["tokens"], batch["segment_ids"]
            _, _, aux = model.apply(params, tokens, segment_ids=documents, return_logits=False)
            ce = cross_entropy(aux["final_hidden"], params["params"]["head"], batch["targets"])
            return (ce + aux["index_loss"].sum()) / (batch["targets"] >= 0).sum()

        @jax.jit
        def step(params, moments, batch):
            loss, gradients = jax.value_and_grad(loss_of)(params, batch)
            updates, moments = optimizer.update(gradients, moments, params)
            return optax.apply_updates(params, updates), moments, loss

        moments = optimizer.init(params)
        for batch in batches:
            params, moments, loss = step(params, moments, batch)
            yield params, loss

Without the index loss, give ``functools.partial(decay_mask, trains="model")`` as the mask. On a mesh, place ``params``
with ``dsa_jax.sharding.param_shardings`` and the batches with ``batch_sharding``, and iterate inside
``jax.set_mesh(mesh)``. A batch is described in ``train.data.rows``.
"""
