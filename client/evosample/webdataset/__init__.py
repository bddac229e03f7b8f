"""Planned samples out of WebDataset shards: tar files on disk, on HTTP servers and in object stores, read by sample id.

`index_shards` (the command `evosample index`) notes once where in its shard each sample lies. `Shards` maps sample ids
to shards and keys by these indexes; `Dataset` reads the samples, and passes them through webdataset's own filters:

    shards = evosample.webdataset.Shards("train-{000..029}.tar")
    dataset = evosample.webdataset.Dataset(shards).decode("l8").to_tuple("png", "cls")
    experiment = client.create_experiment(..., num_samples=len(shards), shard_sizes=shards.shard_sizes)
    loader = evosample.torch.Loader(dataset, experiment, ...)
"""

from evosample.webdataset.dataset import Dataset
from evosample.webdataset.index import IndexedShard, Location, Shards, index_shards

__all__ = ["Dataset", "IndexedShard", "Location", "Shards", "index_shards"]
