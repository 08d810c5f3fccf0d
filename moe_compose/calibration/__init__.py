"""What experts do on text: from files to statistics of every layer, expert and domain.

    data.py         text files, JSON lines and data sets → domains of documents
    reading.py      one file, bytes → documents
    drawing.py      which parts of which documents become sequences
    tokens.py       documents → sequences of token ids → batches
    tokenizer.py    the checkpoint's own tokenizer
    options.py      CalibrateOptions
    checks.py       what can be known to go wrong before anything runs
    observe.py      one layer's experts, while text passes through them
    calls.py        what the experts are called with, whatever a class calls them with
    once.py         experts that run once, for the model and for what is measured of them
    pairs.py        what each expert makes of the tokens routed to it
    residual.py     the residual stream that a block of experts adds to
    router.py       the router's logits
    leave_out.py    what a layer loses without an expert; masked_error.py measures it
    similarity.py   how alike experts are, on a sample of tokens; sampling.py draws it
    calibrate.py    all layers, resumable
    ranks.py        several processes, each on its part of the text
    resume.py       what an interrupted run leaves for the next one
    stats.py        ExpertStats: the sums; record.py says of what, files.py keeps them
    criteria.py     from sums to a worth of every expert; whether the text was enough
    summary.py      a layer in a few numbers
    aimer.py        a worth of every expert from its weights alone
    pruning.py      from either to a plan with fewer experts
    grouping.py     which experts are alike: hc-smoe, m-smoe, ream
    alignment.py    which of their neurons correspond
    merging.py      from both to a plan whose experts are means of others
    sequence.py     the same, each layer measured behind the merged ones before it

Example:
    >>> import moe_compose as mc
    >>> stats = mc.calibrate(moe, {"en": english, "py": python})        # doctest: +SKIP
    >>> stats.sums(3)["gated_norm"].shape                               # doctest: +SKIP
    torch.Size([64])
"""
