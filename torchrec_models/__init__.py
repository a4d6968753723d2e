"""The ranker: content codes trained as sparse features in a multi-task TorchRec model."""
