"""The embedded world: scenes, judge, crowd, pretraining, assets."""
