import torch
def test_tiny(tiny_pipeline, tiny_model):
    import time
    from latentindigo import RestorationPipeline
    p = RestorationPipeline.from_pretrained(tiny_model)
    assert p.weights_hash()==tiny_pipeline.weights_hash()
    for kw in ({}, {"method":"pixel-inn"}, {"method":"pixel-inn","update":"through"},{"num_samples":2}):
        t=time.time(); r=p(torch.rand(3,20,24), steps=2, output_type="pt", **kw); print(time.time()-t, r.images[0].shape, r.images[0].mean(), r.images[0].std(), r.settings, [u.shape for u in r.uncertainty or []])
