"""DEC with early exits (section 4.3 of the E2CM paper; DEC: Xie, Girshick and Farhadi, 2016): clustering of images.

From the papers: An encoder is a sequence of layers that ends in a code of 10 numbers. Each cluster has a centre among
the codes.

1. The encoder is pretrained as a stacked denoising autoencoder. First, one layer after the other learns to restore its
   input from a corrupted copy. Then all of them together learn to restore the images.
2. k-means of the codes gives the first centres.
3. DEC: q[i, k] is the soft assignment of sample i to cluster k (Student's t around the centres). The target p is q
   squared, divided by the size of each cluster. Layers and centres descend along the gradient of KL(p || q). p is
   computed again from time to time. It ends when less than 0.1% of the samples have changed their cluster since the
   last time.

That is the large encoder. An exit behind its first layers has an encoder of its own: those layers, copied and frozen,
and a last layer to a code, trained by the same three steps. Then E2CM uses the cluster centres as class means.

Ours, where the papers leave it open:

- The k-means of each encoder numbers its clusters in an arbitrary order. They get the numbers of the large encoder's
  clusters with which they agree in most training samples. No label is needed.
- Thresholds are found on training images, with the large encoder's assignment for labels. A sample that leaves at no
  exit gets that assignment, too: the nearest centre, without the normalisation of equation 4.
- Adam with a falling learning rate and far fewer steps, in place of 300,000 steps of plain gradient descent. The
  decoders of the shared layers start from those of the large encoder.
- Images are divided by their root mean square, so that squares have the mean 1, as in the original. That of the
  training images is kept in the network.
- `distort`: DEC learns from altered images, after Guo, Zhu, Liu and Yin (2018). Without it, DEC is as published.

`build` makes the network, `train` does all of the above.
"""

from .formulas import divergence, soft_assignment, target
from .network import CodeMeans, build, shifted
from .run import TrainingResult, train
from .schedule import Schedule

__all__ = [
    "CodeMeans",
    "Schedule",
    "TrainingResult",
    "build",
    "divergence",
    "shifted",
    "soft_assignment",
    "target",
    "train",
]
