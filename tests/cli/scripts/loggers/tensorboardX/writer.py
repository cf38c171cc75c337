class SummaryWriter:
    def __init__(self):
        self.events = []

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, display_name="", summary_description=""):
        self.events.append((tag, float(scalar_value), global_step))

    def add_scalars(self, main_tag, tag_scalar_dict, global_step=None, walltime=None):
        self.events += [(f"{main_tag}/{tag}", float(value), global_step) for tag, value in tag_scalar_dict.items()]

    def add_histogram(self, tag, values, global_step=None):
        self.events.append((tag, len(values), global_step))
