"""IEFT for Hugging Face. Importing this package registers IEFT checkpoints with the auto classes of `transformers`.

The network, processor and pipeline, which the auto classes need as classes, and the image reader, which the processor
needs, are imported at once; everything else on first use.
"""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import processing_ieft
from configuration_ieft import IeftConfig
from ieft.data.images import read_image
from modeling_ieft import IeftForImageTextRetrieval, IeftModel
from pipeline_ieft import ImageTextRetrievalPipeline
from processing_ieft import IeftImageProcessor, IeftProcessor

LOADED_ON_FIRST_USE = {
    "EvaluationSet": "ieft.training.items",
    "TrainingItems": "ieft.training.items",
    "keep_unique_captions": "ieft.evaluation.metrics",
    "retrieval_recalls": "ieft.evaluation.metrics",
    "score_matrix": "ieft.evaluation.ranking",
    "draw_scene": "ieft.data.scenes",
    "IeftTrainer": "ieft.training.trainer",
    "IeftTrainingArguments": "ieft.training.trainer",
    "load_retrieval_dataset": "prepare_datasets",
}

processing_ieft.FULL_READER = read_image
AutoConfig.register("ieft", IeftConfig, exist_ok=True)
AutoModel.register(IeftConfig, IeftModel, exist_ok=True)
# As the cross-encoders of text retrieval: a pair goes in, one logit comes out.
AutoModelForSequenceClassification.register(IeftConfig, IeftForImageTextRetrieval, exist_ok=True)
AutoProcessor.register(IeftConfig, IeftProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "image-text-retrieval",
    pipeline_class=ImageTextRetrievalPipeline,
    pt_model=AutoModelForSequenceClassification,
    type="multimodal",
)

# A configuration names the pipeline's code in its checkpoint, for which transformers asks trust_remote_code. Here the
# pipeline is registered: the name stays in what is saved, and is not shown to transformers.
IeftConfig.custom_pipelines = property(  # type: ignore[attr-defined]
    lambda config: {}, lambda config, pipelines: config.__dict__.update(custom_pipelines=pipelines)
)


def __getattr__(name):
    if name not in LOADED_ON_FIRST_USE:
        raise AttributeError(f"module 'ieft' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(LOADED_ON_FIRST_USE[name]), name)


def __dir__():
    return sorted([*globals(), *LOADED_ON_FIRST_USE])


__all__ = [
    "IeftConfig",
    "IeftForImageTextRetrieval",
    "IeftImageProcessor",
    "IeftModel",
    "IeftProcessor",
    "ImageTextRetrievalPipeline",
    *LOADED_ON_FIRST_USE,
]
