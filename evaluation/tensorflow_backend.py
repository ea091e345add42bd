"""The original's way to features: the TensorFlow graph itself, for comparison with the PyTorch network."""

import os

import numpy as np

from evaluation.graph import read_graph
from evaluation.inception import CHANNELS, GRAPH_URL

TAPS = ("pool_3:0", "mixed_6/conv:0")


class TensorFlowFeatures:
    """Both taps of a frozen graph, as numpy arrays; called like InceptionFeatures."""

    def __init__(self, graph_path):
        try:
            self.softmax = read_graph(graph_path).get("softmax/weights")
        except ValueError as error:
            raise ValueError(f"{error}; TensorFlow needs the graph, from {GRAPH_URL}") from None
        if self.softmax is None or self.softmax.ndim != 2:
            raise ValueError(f"{graph_path}: softmax/weights is missing; expected the graph from {GRAPH_URL}")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow  # after torchvision, which is imported above: the other order ends in a segmentation fault

        tf = tensorflow.compat.v1
        definition = tf.GraphDef()
        with open(graph_path, "rb") as file:
            definition.ParseFromString(file.read())
        with tf.Graph().as_default() as graph:
            self.images = tf.placeholder(tf.float32, [None, None, None, 3])
            try:
                given = {"ExpandDims:0": self.images}
                self.taps = tf.import_graph_def(definition, input_map=given, return_elements=TAPS, name="inception")
            except ValueError as error:
                raise ValueError(f"{graph_path}: not the Inception graph of 2015 ({error})") from None
            self.pool = tf.placeholder(tf.float32, [None, len(self.softmax)])
            self.product = tf.matmul(self.pool, tf.constant(self.softmax))
        options = tf.ConfigProto(allow_soft_placement=True)
        options.gpu_options.allow_growth = True
        self.session = tf.Session(graph=graph, config=options)

    def __call__(self, images):
        """(N, H, W, 3) uint8, RGB -> (N, 2048) pooled and (N, 2023) spatial features, the latter in NHWC order."""
        pool, spatial = self.session.run(self.taps, {self.images: np.asarray(images, np.float32)})
        return pool.reshape(len(pool), -1), spatial[..., :CHANNELS].reshape(len(pool), -1)

    def logits(self, pool):
        """(N, 2048) -> (N, 1008), without the bias."""
        return self.session.run(self.product, {self.pool: np.asarray(pool)})
