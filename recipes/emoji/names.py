"""What things are called: styles, colours, common names, plurals and measure words.

Official names come from Unicode CLDR; this file holds what CLDR does not say. Everything is plain data, so that a
language or a synonym is added by adding a line.
"""

# name -> (share of styled scenes, English words, Chinese words)
STYLES: dict[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "fluent-3d": (4.0, ("3D render", "3d"), ("三维渲染", "3D渲染", "立体")),
    "noto": (4.0, ("cartoon sticker", "cartoon"), ("卡通贴纸", "卡通")),
    "fluent-flat": (1.2, ("flat illustration", "flat"), ("扁平插画", "扁平风格")),
    "twemoji": (1.2, ("simple icon", "icon"), ("简约图标", "图标")),
    "noto-v1": (0.8, ("retro cartoon", "retro"), ("复古卡通", "复古")),
    "emojione": (0.8, ("picture book", "storybook"), ("绘本", "绘本风格")),
    "fxemoji": (0.5, ("paper cutout", "paper cut"), ("剪纸", "剪纸风格")),
}
# what a prompt without a style word draws: the first of these that has the thing
DEFAULT_STYLES = ("noto", "fluent-3d", "twemoji", "fluent-flat")

COLORS: dict[str, tuple[tuple[int, int, int], str]] = {
    "white": ((255, 255, 255), "白色"),
    "black": ((24, 24, 28), "黑色"),
    "gray": ((176, 180, 188), "灰色"),
    "red": ((226, 62, 62), "红色"),
    "orange": ((250, 160, 70), "橙色"),
    "yellow": ((251, 228, 130), "黄色"),
    "light green": ((188, 230, 178), "浅绿色"),
    "green": ((82, 176, 98), "绿色"),
    "teal": ((64, 170, 170), "青色"),
    "sky blue": ((152, 206, 245), "天蓝色"),
    "blue": ((60, 110, 220), "蓝色"),
    "navy": ((30, 42, 92), "深蓝色"),
    "purple": ((150, 104, 204), "紫色"),
    "lavender": ((214, 200, 242), "淡紫色"),
    "pink": ((252, 198, 216), "粉色"),
    "brown": ((150, 104, 74), "棕色"),
    "beige": ((242, 228, 204), "米色"),
}
PASTELS = ("sky blue", "light green", "pink", "beige", "lavender", "yellow")

# CLDR name -> (other English names, other Chinese names); these are also drawn twice as often in training
COMMON: dict[str, tuple[str, str]] = {
    "red apple": ("apple", "苹果"), "automobile": ("car,red car", "轿车,小汽车,车"), "deciduous tree": ("tree", "树,大树"),
    "evergreen tree": ("pine tree,pine", "松树"), "hot beverage": ("coffee,cup of coffee", "咖啡,一杯咖啡"),
    "airplane": ("plane,aeroplane", "客机"), "bicycle": ("bike", "单车"), "motorcycle": ("motorbike", "机车"),
    "delivery truck": ("truck,lorry", "卡车"), "fire engine": ("fire truck", "救火车"), "hamburger": ("burger", "汉堡包"),
    "soccer ball": ("football", "球"), "mobile phone": ("phone,smartphone", "智能手机"), "honeybee": ("bee", "小蜜蜂"),
    "lady beetle": ("ladybug,ladybird", "七星瓢虫"), "doughnut": ("donut", "面包甜甜圈"), "television": ("tv", "电视"),
    "laptop": ("computer,notebook computer", "电脑,笔记本"), "wrapped gift": ("gift,present", "礼盒,礼品"),
    "closed book": ("book", "书本"), "envelope": ("letter", "信"), "snowman without snow": ("snowman", "小雪人"),
    "blossom": ("flower,yellow flower", "花,花朵"), "rose": ("red rose", "玫瑰花"), "red heart": ("heart", "心,爱心,红心"),
    "sailboat": ("boat,sailing boat", "小船"), "house": ("home", "小房子,屋子"), "ewe": ("sheep", "绵羊,羊"),
    "snow-capped mountain": ("snowy mountain", "雪峰"), "mountain": ("hill", "高山"), "baby chick": ("chick", "小黄鸡"),
    "ox": ("bull", "牛"), "T-Rex": ("dinosaur,tyrannosaurus", "恐龙"), "rabbit": ("bunny", "小兔子,兔"),
    "cat": ("kitten,kitty", "小猫,猫咪"), "dog": ("puppy", "小狗,狗狗"), "panda": ("panda bear", "大熊猫"), "bear": ("brown bear", "小熊"),
    "girl": ("little girl,young girl", "小女孩,女生"), "boy": ("little boy,young boy", "小男孩,男生"), "woman": ("lady", "女士"),
    "man": ("gentleman", "男士"), "baby": ("infant", "婴儿,宝宝"), "old man": ("grandfather,grandpa", "爷爷"),
    "old woman": ("grandmother,grandma", "奶奶"), "person": ("human,adult", "人"), "child": ("kid", "孩子,小孩"),
    "grinning face": ("smiley,happy face", "笑脸,开心的脸"), "crying face": ("sad face", "哭脸"), "angry face": ("mad face", "生气的脸"),
    "health worker": ("doctor,nurse", "医生"), "cook": ("chef", "大厨"), "police officer": ("policeman,cop", "警官"),
    "crescent moon": ("moon", "月亮"), "sun": ("sunshine", "日头"), "fire": ("flame", "火"), "droplet": ("water drop,drop of water", "水珠"),
    "wine glass": ("wine,glass of wine", "红酒"), "beer mug": ("beer", "一杯啤酒"), "bread": ("loaf of bread", "吐司"),
    "birthday cake": ("cake", "蛋糕"), "shortcake": ("slice of cake", "一块蛋糕"), "french fries": ("fries", "炸薯条"),
    "watch": ("wristwatch", "腕表"), "alarm clock": ("clock", "时钟,钟"), "woman's hat": ("hat,straw hat", "帽子,草帽"),
    "crown": ("golden crown", "王冠"), "running shoe": ("sneaker,shoe", "运动鞋,鞋子"), "t-shirt": ("shirt", "衬衫"),
    "glasses": ("eyeglasses", "近视眼镜"), "backpack": ("school bag", "背包"), "handbag": ("bag", "包包"),
    "gem stone": ("diamond,gem", "钻石"), "locked": ("lock,padlock", "锁"), "high voltage": ("lightning,lightning bolt", "闪电"),
    "castle": ("fairy tale castle", "城堡"), "steaming bowl": ("noodles,ramen,bowl of noodles", "拉面,一碗面"),
    "cooked rice": ("rice,bowl of rice", "白米饭"), "jack-o-lantern": ("pumpkin,halloween pumpkin", "南瓜"),
    "ear of corn": ("corn", "苞米"), "hot pepper": ("chili,chili pepper", "辣椒"), "honey pot": ("honey", "蜜罐"),
    "meat on bone": ("meat", "肉"), "game die": ("dice,die", "色子"), "bullseye": ("dart board,target", "靶子"),
    "video game": ("game controller,gamepad", "手柄"), "framed picture": ("painting", "画,油画"),
    "magnifying glass tilted left": ("magnifying glass", "放大镜"), "flying saucer": ("ufo", "不明飞行物"),
    "ringed planet": ("planet,saturn", "行星,土星"), "globe showing Asia-Australia": ("earth,globe", "地球"),
    "spiral shell": ("seashell,shell", "贝壳"), "bouquet": ("bunch of flowers", "一束花"), "potted plant": ("plant", "植物"),
    "seedling": ("sprout", "小苗"), "couch and lamp": ("sofa,couch", "沙发"), "light bulb": ("lamp", "灯"),
    "musical keyboard": ("piano", "钢琴"), "pile of poo": ("poop", "便便"), "chicken": ("hen", "母鸡"), "turtle": ("tortoise", "乌龟"),
    "crab": ("red crab", "螃蟹"), "eagle": ("hawk", "老鹰"), "dove": ("pigeon", "鸽子"), "bug": ("caterpillar", "虫子"),
    "eggplant": ("aubergine", "紫茄子"), "peach": ("pink peach", "桃子"), "pear": ("green pear", "梨子"),
    "tangerine": ("orange", "橙子"), "taxi": ("cab", "的士"), "rocket": ("spaceship,space rocket", "飞船"),
    "balloon": ("red balloon", "红气球"), "mage": ("wizard", "巫师"), "merperson": ("mermaid", "美人鱼"),
    "Santa Claus": ("santa", "圣诞爷爷"), "horse": ("pony", "骏马"), "butterfly": ("blue butterfly", "彩蝶"), "penguin": ("little penguin", "小企鹅"),
    "guitar": ("electric guitar", "电吉他"), "pizza": ("slice of pizza", "比萨"), "sunflower": ("yellow sunflower", "太阳花"),
    "strawberry": ("red strawberry", "红草莓"), "banana": ("yellow banana", "黄香蕉"), "lion": ("lion head", "雄狮"), "tiger": ("big tiger", "猛虎"),
    "elephant": ("big elephant", "象"), "fish": ("little fish", "小鱼"), "bird": ("little bird", "小鸟"), "duck": ("little duck", "小鸭子"),
    "frog": ("green frog", "蛙"), "monkey": ("little monkey", "小猴子,猴"), "pig": ("little pig", "小猪"), "cow": ("dairy cow", "乳牛"),
    "ice cream": ("bowl of ice cream", "雪糕"), "cactus": ("green cactus", "绿仙人掌"), "camera": ("photo camera", "照相机"),
    "robot": ("robot head", "机器人头"), "ghost": ("little ghost", "幽灵"), "star": ("yellow star", "黄星星"), "umbrella": ("open umbrella", "打开的伞"),
    "train": ("railway train", "列车"), "bus": ("city bus", "巴士"), "ship": ("big ship", "轮船"), "helicopter": ("chopper", "直升飞机"),
}

IRREGULAR_PLURALS = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "fish": "fish", "sheep": "sheep", "deer": "deer", "moose": "moose",
    "bison": "bison", "shrimp": "shrimp", "squid": "squid", "wolf": "wolves", "leaf": "leaves", "knife": "knives", "loaf": "loaves",
    "elf": "elves", "foot": "feet", "tooth": "teeth", "child": "children", "man": "men", "woman": "women", "person": "people",
    "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes", "volcano": "volcanoes", "mosquito": "mosquitoes",
    "die": "dice", "policeman": "policemen", "gentleman": "gentlemen", "snowman": "snowmen", "scarf": "scarves", "buffalo": "buffaloes",
    "kiwi": "kiwis", "hippopotamus": "hippopotamuses", "dice": "dice", "blowfish": "blowfish", "jellyfish": "jellyfish",
}  # fmt: skip
SINGULAR_IN_S = {
    "bus", "trolleybus", "minibus", "octopus", "cactus", "lotus", "compass", "dress", "glass", "hibiscus", "walrus", "abacus",
    "Santa Claus", "Mrs. Claus", "Mx Claus", "tennis", "fortress", "princess", "grass", "lens", "gas", "hypha", "hippopotamus",
}  # fmt: skip
MASS = {
    "bread", "garlic", "rice", "cooked rice", "curry rice", "sushi", "oden", "sake", "popcorn", "butter", "salt", "canned food", "honey",
    "custard", "mate", "ice", "shaved ice", "bacon", "spaghetti", "broccoli", "leafy green", "ginger root", "coral", "bubble tea", "coffee", "wine",
    "beer", "corn", "meat", "lightning", "wood", "fog", "fire", "rain", "tennis", "cricket game", "field hockey", "ice hockey",
    "lacrosse", "ping pong", "badminton", "bowling", "luggage", "camping", "soap", "thread", "yarn", "dna", "money", "sunshine",
    "cooking", "construction", "building construction", "performing arts", "confetti", "mail", "milky way", "horse racing", "foggy",
    "Tokyo tower", "mount fuji", "Statue of Liberty", "Santa Claus", "santa", "Mrs. Claus", "Mx Claus", "selfie", "locked", "unlocked",
    "ZZZ", "nail polish", "breast-feeding", "metro", "light rail", "high voltage", "map of Japan", "chocolate", "poop", "saturn",
}  # fmt: skip
AN_WORDS = ("hour", "x-ray", "heir", "honest")
A_WORDS = ("uni", "one", "euro", "ukulele", "ufo", "use")

MEASURE_BY_SUBGROUP = {
    "animal-mammal": "只", "animal-bird": "只", "animal-amphibian": "只", "animal-reptile": "只", "animal-marine": "只", "animal-bug": "只",
    "plant-flower": "朵", "plant-other": "棵", "food-prepared": "份", "food-asian": "份", "drink": "杯", "place-building": "座",
    "place-religious": "座", "place-geographic": "座", "transport-ground": "辆", "transport-water": "艘", "transport-air": "架",
    "clothing": "件", "musical-instrument": "把", "phone": "部", "computer": "台", "tool": "把", "cat-face": "只", "monkey-face": "只",
    "heart": "颗", "hand-fingers-open": "只", "hand-fingers-partial": "只", "hand-single-finger": "只", "hand-fingers-closed": "只",
    "person-role": "位", "person-activity": "位", "person-sport": "位", "money": "张", "face-smiling": "张", "face-affection": "张",
    "face-negative": "张", "face-concerned": "张", "face-neutral-skeptical": "张",
}  # fmt: skip
MEASURE: dict[str, str] = {
    "马": "匹", "骏马": "匹", "狼": "匹", "斑马": "匹", "牛": "头", "奶牛": "头", "公牛": "头", "水牛": "头", "大象": "头", "猪": "头", "狮子": "头",
    "驴": "头", "骆驼": "头", "鱼": "条", "热带鱼": "条", "鲨鱼": "条", "蛇": "条", "龙": "条", "鳄鱼": "条", "鲸鱼": "头", "恐龙": "只", "霸王龙": "只",
    "爪印": "个", "羽毛": "根", "海螺": "个", "珊瑚": "株", "蜘蛛网": "张", "细菌": "个", "花束": "束", "枫叶": "片", "落叶": "片", "风吹叶落": "片",
    "蘑菇": "个", "幼苗": "株", "盆栽植物": "盆", "稻子": "株", "三叶草": "株", "四叶草": "株", "药草": "株", "空巢": "个", "有蛋的巢": "个",
    "葡萄": "串", "香蕉": "根", "西瓜": "个", "胡萝卜": "根", "黄瓜": "根", "玉米": "根", "红辣椒": "个", "汉堡": "个", "披萨": "块", "面包": "个",
    "芝士": "块", "蛋": "个", "热狗": "个", "三明治": "个", "面条": "碗", "米饭": "碗", "寿司": "个", "饭团": "个", "月饼": "个", "饺子": "个",
    "煎蛋": "个", "甜甜圈": "个", "饼干": "块", "巧克力": "块", "棒棒糖": "根", "糖": "颗", "筷子": "双", "匙": "把", "菜刀": "把", "火车": "列", "高速列车": "列",
    "子弹头高速列车": "列", "蒸汽火车": "列", "停止标志": "个", "车轮": "个", "锚": "个", "救生圈": "个", "火箭": "枚", "卫星": "颗", "降落伞": "个",
    "飞碟": "个", "座位": "个", "砖": "块", "岩石": "块", "木头": "块", "太阳": "个", "星星": "颗", "闪亮的星星": "颗", "流星": "颗", "彗星": "颗",
    "云": "朵", "彩虹": "道", "伞": "把", "雨伞": "把", "阳伞": "把", "收起的伞": "把", "雪花": "片", "火焰": "团", "水滴": "滴", "圣诞树": "棵",
    "围巾": "条", "领带": "条", "牛仔裤": "条", "连衣裙": "条", "短裤": "条", "裤子": "条", "手套": "双", "袜子": "双", "男鞋": "双", "跑鞋": "双",
    "登山鞋": "双", "平底鞋": "双", "高跟鞋": "双", "女靴": "双", "眼镜": "副", "墨镜": "副", "护目镜": "副", "皇冠": "顶", "女帽": "顶", "礼帽": "顶",
    "毕业帽": "顶", "鸭舌帽": "顶", "戒指": "枚", "宝石": "颗", "手提包": "个", "书包": "个", "钱包": "个", "口红": "支", "唇膏": "支", "折扇": "把",
    "鼓": "面", "长鼓": "面", "钥匙": "把", "合上的锁": "把", "打开的锁": "把", "剪刀": "把", "铅笔": "支", "钢笔": "支", "笔": "支", "画笔": "支",
    "蜡笔": "支", "蜡烛": "支", "椅子": "把", "床": "张", "门": "扇", "窗户": "扇", "镜子": "面", "牙刷": "把", "扫帚": "把", "合上的书本": "本",
    "打开的书本": "本", "绿色书本": "本", "蓝色书本": "本", "橙色书本": "本", "书": "摞", "笔记本": "本", "报纸": "份", "信封": "封", "信用卡": "张",
    "地图": "张", "世界地图": "张", "相机": "台", "电视机": "台", "摄像机": "台", "收音机": "台", "炸弹": "枚", "弓和箭": "副", "盾牌": "面",
    "齿轮": "个", "磁铁": "块", "工具箱": "个", "梯子": "架", "天平": "架", "螺母与螺栓": "个", "锚链": "条", "硬币": "枚", "钱袋": "个",
    "宝箱": "个", "牙齿": "颗", "骨头": "根", "耳朵": "只", "眼睛": "只", "金牌": "枚", "银牌": "枚", "铜牌": "枚", "风筝": "只", "骰子": "颗",
    "幽灵": "个", "机器人": "个", "外星人": "个", "帐篷": "顶", "喷泉": "座", "摩天轮": "座", "桥": "座", "夜幕下的桥": "座", "茶壶": "把", "奶瓶": "个",
    "罐": "个", "冰块": "块", "自行车": "辆", "滑板": "块", "医生": "位", "山": "座", "沙滩伞": "把", "照片": "张", "带框的画": "幅", "画": "幅",
    "人": "个", "手": "只", "鸡": "只", "轮船": "艘", "笔记本电脑": "台",
}  # fmt: skip

HATS = ("woman's hat", "top hat", "crown", "billed cap", "graduation cap")
HEADS = (
    "girl", "boy", "woman", "man", "child", "baby", "person", "old man", "old woman", "cat face", "dog face", "bear", "panda", "fox", "lion",
    "tiger face", "rabbit face", "mouse face", "pig face", "frog", "koala", "monkey face", "polar bear", "hamster", "unicorn", "robot",
    "grinning face", "smiling face with smiling eyes", "slightly smiling face", "smiling face with sunglasses", "winking face", "nerd face",
)  # fmt: skip
