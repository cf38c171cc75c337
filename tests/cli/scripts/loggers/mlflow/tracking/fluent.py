metrics_of_the_run = []


def log_metric(key, value, step=None, synchronous=None, timestamp=None, run_id=None, model_id=None, dataset=None):
    metrics_of_the_run.append((key, float(value)))
    return f"logged {key}"


def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None, model_id=None, dataset=None):
    metrics_of_the_run.extend((key, float(value)) for key, value in metrics.items())
